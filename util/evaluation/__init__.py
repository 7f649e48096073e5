"""Metrics of generated images against a reference.

    evaluator = open_evaluator(Evaluation(reference="digits"), img_size=8, num_images=1000)
    images = evaluator.start(1000)
    for indices, batch in ...:  # uint8 (n, H, W, 3)
        images.add(indices, batch)
    evaluator.report(images.summary(), settings={})

evaluator.py defines these methods, metrics.py the metrics and their table METRICS, features.py the
feature extractors, references.py the references, baseline.py the metrics of real images, reports.py
and sweep.py the outputs, and settings.py the flags. `python -m util.evaluation` needs no model.

Nothing is imported here, so that flags can be parsed before torch is loaded.
"""

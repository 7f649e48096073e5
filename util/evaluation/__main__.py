"""Metrics of images without a model: python -m util.evaluation IMAGES --reference REFERENCE

IMAGES is a folder of images or an .npz; REFERENCE is either, an .npz of statistics (`mu`,
`sigma`: ADM's, or the official repository's), or a data set: a folder with train/class/image.
"""

from util.data import check_data_set
from util.data.settings import PLAIN_NAMES, Reading, plain_reading
from util.evaluation.settings import Evaluation
from util.files import make_folder
from util.flags import Parser, add_device_flag, add_size_flag, run
from util.run import last_words
from util.settings import add_flags, from_flags, said_flags


def get_parser():
    parser = Parser(
        prog="python -m util.evaluation",
        description="Metrics of a folder of images or an .npz, without a model.",
    )
    parser.add_argument("images", help="a folder of images, or an .npz with arr_0")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="append the metrics to results.jsonl in this folder (default: print only)",
    )
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        help="the data set whose training images are measured for comparison, and looked for among "
        "the images by --metrics memorization (default: that of --reference)",
    )
    add_size_flag(
        parser,
        "side of the images, or height and width; those of a folder that have another size are "
        "cropped to it like the data (default: that of all)",
    )
    add_flags(parser, Reading, PLAIN_NAMES)
    add_device_flag(parser)
    add_flags(parser.add_argument_group("metrics"), Evaluation, reference=None)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from util import dist
    from util.evaluation.accumulator import summarize
    from util.evaluation.evaluator import open_evaluator
    from util.evaluation.image_sets import open_images

    device = dist.init(args.device)
    if args.data_path:
        check_data_set(args.data_path)
    if args.output_dir:
        make_folder(args.output_dir, "--output_dir")
        last_words.set_folder(args.output_dir, "evaluation")
    reading = plain_reading(None, said_flags(Reading, args))
    images = open_images(args.images, args.img_size, reading)
    evaluator = open_evaluator(
        from_flags(Evaluation, args),
        args.data_path,
        img_size=images[0][0].shape[:2],
        num_images=len(images),
        device=device,
        reading=reading,
    )
    summaries = summarize(images, evaluator.start(len(images)), "images")
    evaluator.report(summaries, {"source": args.images}, args.output_dir)


if __name__ == "__main__":
    run(main)

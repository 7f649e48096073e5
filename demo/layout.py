"""The page of demo/app.py: what is on it, and what its buttons call in demo/studio.py."""

import html
import time
from contextlib import contextmanager

import gradio as gr
import numpy as np
from PIL import Image

from demo.studio import ON_PAGE, frame, painted, read_seed, shown_field, summary, zoom
from util.run.ending import explain

# the settings that are always seen, and their names on the page; the others unfold
FIRST = {
    "cfg": "Guidance",
    "temperature": "Temperature",
    "num_iter": "Steps",
    "num_sampling_steps": "Diffusion steps",
    "solver": "Solver",
    "order": "Order of tokens",
}
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
.quiet p {font-size: var(--text-sm); overflow-wrap: anywhere; opacity: .75}
.small img {image-rendering: pixelated}
#editor [title="Color"], #editor [title="Clear canvas"] {display: none}
#gallery .grid-wrap {min-height: 0}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(104px, 1fr))}
#gallery .thumbnail-item {aspect-ratio: auto; height: auto}
#gallery .thumbnail-item img {aspect-ratio: 1; height: auto; border-radius: 0}
#gallery .caption-label {position: static; max-width: 100%; border: 0; text-align: center}
"""
FEW_PIXELS = 128  # of pictures that are enlarged without smoothing
KEPT = 256  # pictures in the gallery: each time, a browser is sent all of them
HOUR = 3600  # seconds
AGAIN = "`python sample.py --like FILE.png` makes a picture again from what its PNG says."
INPAINTED = "inpainted: the picture and the mask are not in this file"
SHOWN = {"show_label": False, "format": "png", "interactive": False, "buttons": ["fullscreen"]}
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}


def theme():
    """The colours and fonts of the page; fonts of the reader's machine, none are fetched."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    darker = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return gr.themes.Base(**fonts).set(**darker)


@contextmanager
def told():
    """What a user can change appears as a message on the page."""
    try:
        yield
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        text = html.escape(known.line.removeprefix("error: ").removeprefix("--"))
        raise gr.Error(text, print_exception=False) from None


class Layout:
    """The page of a demo.studio.Studio."""

    def __init__(self, studio):
        self.studio = studio
        small = "small" if min(studio.size) < FEW_PIXELS else ""
        old = {"delete_cache": (HOUR, 24 * HOUR)}  # frames that were shown; kept pictures stay
        with gr.Blocks(title="MAR", analytics_enabled=False, **old) as self.blocks:
            self.made, self.chosen, self.picture = gr.State([]), gr.State(), gr.State()
            gr.Markdown(f"# MAR\n{studio.about()}", elem_classes="quiet")
            with gr.Row():
                with gr.Column(scale=2, min_width=290):
                    self.inputs = self.add_settings()
                with gr.Column(scale=3, min_width=290), gr.Tabs() as self.tabs:
                    with gr.Tab("Generate", id="generate"):
                        self.add_generating()
                    with gr.Tab("Inpaint", id="inpaint"):
                        self.add_inpainting()
            self.add_gallery(small)
            self.connect()

    # ---- what is on it -------------------------------------------------------------------------

    def add_settings(self):
        """Add the settings; the components whose values `read` takes."""
        studio, choices = self.studio, self.studio.class_choices()
        how = {"label": "Class", "allow_custom_value": True, "visible": bool(choices)}
        name = gr.Dropdown(choices, value="all" if choices else "", elem_id="class", **how)
        small = {"precision": 0, "min_width": 100}
        with gr.Row():
            count = gr.Number(studio.few(), label="Pictures", elem_id="count", **small)
            seed = gr.Number(1, label="Seed", elem_id="seed", **small)
        fields = {field.name: field for field in studio.fields}
        boxes = {}
        with gr.Row():
            for field in [fields[name] for name in FIRST if name in fields]:
                boxes[field.name] = self.add_field(field, label=FIRST[field.name])
        with gr.Accordion("More settings", open=False):
            for field in fields.values():
                if field.name not in FIRST:
                    words = field.metadata["help"].replace("--", "")
                    boxes[field.name] = self.add_field(field, info=words)
        return [name, count, seed, *(boxes[name] for name in fields)]

    def add_field(self, field, label=None, info=None):
        """Add a field of Sampling, with the checkpoint's value."""
        value = shown_field(getattr(self.studio.sampling, field.name))
        how = {"label": label or field.name, "info": info, "elem_id": field.name, "min_width": 150}
        if field.metadata.get("choices"):
            choices = self.studio.choices[field.name]
            unset = [(field.metadata["otherwise"].split(":")[0], "")] if value is None else []
            return gr.Dropdown([*unset, *choices], value=value or "", **how)
        if field.type in (int, float):
            return gr.Number(value, precision=0 if field.type is int else None, **how)
        return gr.Textbox(value, **how)

    def add_generating(self):
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        self.status = gr.Markdown(elem_classes="quiet", elem_id="status")
        self.drawn = gr.Image(elem_id="drawn", **SHOWN)

    def add_inpainting(self):
        how = {"file_types": ["image"], "size": "sm", "elem_id": "upload"}
        self.upload = gr.UploadButton("Upload a picture, or choose one below", **how)
        brush = gr.Brush(default_size=48, colors=["#e5484d"], color_mode="fixed")
        self.editor = gr.ImageEditor(
            label="Paint over what is to be replaced",
            elem_id="editor",
            image_mode="RGBA",
            sources=(),
            transforms=(),
            layers=False,
            brush=brush,
            buttons=[],
            format="png",
            canvas_size=(ON_PAGE, ON_PAGE),
        )
        with gr.Row():
            self.inpaint = gr.Button("Inpaint", variant="primary", elem_id="inpaint", scale=3)
            self.stop_inpainting = gr.Button("Stop", scale=1, min_width=80)
        self.filling = gr.Markdown(elem_classes="quiet")
        self.filled = gr.Image(elem_id="filled", **SHOWN)

    def add_gallery(self, classes):
        with gr.Column(visible=False) as self.session:
            gr.Markdown(f"### Made in this session\n{AGAIN}", elem_classes="quiet")
            self.gallery = gr.Gallery(
                show_label=False,
                elem_id="gallery",
                elem_classes=classes,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=[],
                allow_preview=False,
            )
            self.detail = gr.Markdown(elem_classes="quiet", elem_id="detail")
            with gr.Row():
                self.download = gr.DownloadButton("Download PNG", elem_id="download", size="md")
                self.edit = gr.Button("Inpaint this picture", elem_id="edit", size="md")

    # ---- what it does --------------------------------------------------------------------------

    def connect(self):
        """Tie the buttons to the methods below."""
        about = [self.chosen, self.detail, self.download]
        results = [self.made, self.session, self.gallery, *about]
        generating = self.generate.click(
            self.on_generate,
            [self.made, *self.inputs],
            [self.drawn, self.status, *results],
            **ONE_AT_A_TIME,
        )
        inpainting = self.inpaint.click(
            self.on_inpaint,
            [self.picture, self.editor, self.made, *self.inputs],
            [self.filled, self.filling, *results],
            **ONE_AT_A_TIME,
        )
        self.stop.click(None, cancels=[generating])
        self.stop_inpainting.click(None, cancels=[inpainting])
        canvas = [self.picture, self.editor]
        self.upload.upload(self.on_upload, self.upload, canvas)
        self.gallery.select(self.on_select, self.made, about)
        self.edit.click(self.on_edit, self.chosen, [*canvas, self.inputs[0], self.tabs])

    def read(self, name, count, seed, *values):
        """(labels, Sampling, seed) of what the settings hold. Raises ValueError."""
        names = [field.name for field in self.studio.fields]
        sampling = self.studio.settings(dict(zip(names, values, strict=True)))
        return self.studio.labels(name, count), sampling, read_seed(seed)

    def on_generate(self, made, *values):
        with told():
            labels, sampling, seed = self.read(*values)
            yield from self.follow(
                self.studio.generate(labels, sampling, seed), made, labels, sampling, seed
            )

    def on_inpaint(self, picture, edited, made, *values):
        with told():
            labels, sampling, seed = self.read(*values)
            if picture is None:
                raise ValueError("no picture: upload one, or choose one of those below")
            mask = painted(edited["layers"] if edited else (), self.studio.size)
            steps = self.studio.inpaint(picture, mask, labels, sampling, seed)
            yield from self.follow(steps, made, labels, sampling, seed, edited=INPAINTED)

    def follow(self, steps, made, *drawn, **how):
        """Show the steps; keep the last images, among those that were made."""
        start = time.monotonic()
        for images, hidden in steps:
            yield *frame(images, hidden), *[gr.skip()] * 6
        words = f"{len(images)} pictures in {time.monotonic() - start:.1f} s"
        made = (self.studio.keep(images, *drawn, **how) + made)[:KEPT]
        gallery = gr.Gallery(made, selected_index=0)
        yield gr.skip(), words, made, gr.Column(visible=True), gallery, *about(made[0])

    def on_upload(self, path):
        with told():
            return self.canvas(self.studio.open(path))

    def on_edit(self, path):
        picture = np.asarray(Image.open(path))
        return *self.canvas(picture), self.studio.text_of(path), gr.Tabs(selected="inpaint")

    def canvas(self, picture):
        """A picture uint8 (H, W, 3), and what the brush paints on."""
        shown = zoom(picture)
        return picture, {"background": shown, "layers": [], "composite": shown}

    def on_select(self, made, event: gr.SelectData):
        return about(made[event.index])

    def launch(self, host, port):
        """Serve the page in other threads; its address."""
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            max_file_size="100mb",
        )
        return address


def about(kept):
    """What is below the gallery for a (path, name) in it: the path, a few words, the download."""
    path, name = kept
    return path, f"**{name}** · {summary(path)}", path

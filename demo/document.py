"""A page as Markdown, with pictures beside it, and as one HTML file that needs nothing else."""

import base64
from html import escape
from pathlib import Path

from util.files import replacing
from util.run.charts import chart
from util.run.page import STYLE

MORE = """
table { columns: auto; } tr { display: table-row; } tr:first-child { color: var(--soft); }
td, td:first-child { font: inherit; min-width: 7em; } figure { margin: .8em 0; }
"""
KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


class Document:
    """Sections of text, tables, pictures and commands, in the order in which they are added."""

    def __init__(self, title):
        self.title, self.markdown, self.html = title, [f"# {title}"], [f"<h1>{escape(title)}</h1>"]

    def add(self, markdown, html):
        self.markdown.append(markdown)
        self.html.append(html)

    def section(self, title):
        """The heading of what follows."""
        self.add(f"## {title}", f"<h2>{escape(title)}</h2>")

    def text(self, words):
        """A paragraph."""
        self.add(words, f"<p>{escape(words)}</p>")

    def command(self, name, words):
        """A command, and what it is for."""
        self.add(f"{name}:\n\n```\n{words}\n```", f"<p>{name}:</p><pre>{escape(words)}</pre>")

    def table(self, head, rows):
        """Rows of text or numbers; None is a dash."""
        rows = [[shown(cell) for cell in row] for row in [head, *rows]]
        rule = ["---"] * len(head)
        lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
        cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        self.add("\n".join(lines), f"<table>{table}</table>")

    def picture(self, path, caption, folder):
        """A PNG at `path` below the folder of the page."""
        data = base64.b64encode(Path(folder, path).read_bytes()).decode()
        source = f"data:{KINDS[path.suffix]};base64,{data}"
        self.add(
            f"![{caption}]({path.as_posix()})\n\n*{caption}*",
            f'<figure><img src="{source}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>",
        )

    def curves(self, charts, folder):
        """A row of charts. charts: path below the folder, of the SVG for the Markdown -> title and
        series of util.run.charts.chart."""
        figures = {path: chart(*each) for path, each in charts.items()}
        for path, figure in figures.items():
            with replacing(Path(folder, path)) as beside:
                beside.write_text(alone(figure), "utf-8")
        links = " ".join(f"![{title}]({path.as_posix()})" for path, (title, _) in charts.items())
        self.add(links, f'<div class="row charts">{"".join(figures.values())}</div>')

    def write(self, folder):
        """Write report.md and report.html."""
        head = f"<title>{escape(self.title)}</title><style>{STYLE}{MORE}</style>"
        html = (
            '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{head}\n<body>{''.join(self.html)}</body></html>\n"
        )
        for name, text in {
            "report.md": "\n\n".join(self.markdown) + "\n",
            "report.html": html,
        }.items():
            with replacing(Path(folder, name)) as beside:
                beside.write_text(text, "utf-8")


def alone(figure):
    """The SVG in a figure of util.run.charts, as a file of its own, with its title above it."""
    begin, end = figure.index("<svg"), figure.index("</svg>")
    own = '<svg xmlns="http://www.w3.org/2000/svg" width="380" font-family="sans-serif"'
    svg = figure[begin:end].replace("<svg", own, 1)
    title = figure[:begin].split("<figcaption>")[1].split("<")[0]
    title = f'<text x="370" y="22" class="end">{title}</text>'
    return svg.replace(">", f"><style>{STYLE}</style>", 1) + title + "</svg>"


def shown(cell):
    """The text of a cell."""
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return "–" if cell is None else str(cell)

"""Makes the pictures of docs/tools.md: ``docs/explain.html`` and ``docs/top.svg``.

    python examples/tool_pages.py [FOLDER]

A real language model (SmolLM2-135M-Instruct) answers the demo's questions about a handbook whose
pages it has read one at a time. Needs what the demo needs; two minutes on two idle cores.
"""

from __future__ import annotations

import io
import random
import re
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from sgl_blend.bench.demo import BLEND, EXACT, HEAD, POOL, QUESTIONS, TAIL, pages
from sgl_blend.cli.main import main, make_parser
from sgl_blend.cli.table import Progress
from sgl_blend.cli.top import observer, picture
from sgl_blend.harness import real_models
from sgl_blend.harness.client import greedy
from sgl_blend.harness.server import Server, serve

DOCS = Path(__file__).resolve().parents[1] / "docs"


def prompts() -> list[str]:
    """The demo's: each question behind all pages, in an order of its own."""
    return [
        HEAD + "\n\n".join(random.Random(i).sample(pages(), len(pages()))) + TAIL.format(q.text)
        for i, q in enumerate(QUESTIONS)
    ]


def make(out: Path) -> int:
    with Progress() as progress:
        model = real_models.fetch(real_models.SMOLLM2, progress)
        name = real_models.SMOLLM2.name
        args = ["--enable-blend", "--enable-metrics", "--max-total-tokens", str(POOL)]
        progress("starting a server")
        with (
            tempfile.TemporaryDirectory() as folder,
            serve(model, [*args, "--served-model-name", name]) as server,
        ):
            progress("the server reads the pages")
            params = greedy("", 1, EXACT)["sampling_params"]
            server.generate(text=[HEAD + page for page in pages()], sampling_params=params)
            for prompt in prompts()[1:]:
                server.client.stream(greedy(prompt, 8, BLEND))
            (out / "top.svg").write_text(top(server))
            file = Path(folder) / "prompt.txt"
            file.write_text(prompts()[0])
            progress.done()
            page = str(out / "explain.html")
            return main(["explain", str(file), "--out", page, "--url", server.url])


def top(server: Server) -> str:
    """What ``sgl-blend top`` shows of the server, as SVG that loads no font from elsewhere."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    args = make_parser().parse_args(["top", "--url", server.url])
    console.print(picture(observer(args).frame()))
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)
    return console.export_svg(title="sgl-blend top", code_format=form, unique_id="top")


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS))

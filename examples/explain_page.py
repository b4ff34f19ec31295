"""Makes ``docs/explain.html``, an example of what ``sgl-blend explain`` shows.

    python examples/explain_page.py [OUT]

A real language model (SmolLM2-135M-Instruct) answers a question about a handbook whose pages it has
read one at a time. Needs what the demo needs; a minute on two idle cores.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from sgl_blend.bench.demo import EXACT, HEAD, POOL, QUESTIONS, TAIL, pages
from sgl_blend.cli.main import main
from sgl_blend.cli.table import Progress
from sgl_blend.harness import real_models
from sgl_blend.harness.client import greedy
from sgl_blend.harness.server import serve

OUT = Path(__file__).resolve().parents[1] / "docs" / "explain.html"


def make(out: Path) -> int:
    with Progress() as progress:
        model = real_models.fetch(real_models.SMOLLM2, progress)
        order = random.Random(0).sample(pages(), len(pages()))  # the demo's first prompt
        prompt = HEAD + "\n\n".join(order) + TAIL.format(QUESTIONS[0].text)
        name = real_models.SMOLLM2.name
        args = ["--enable-blend", "--max-total-tokens", str(POOL), "--served-model-name", name]
        progress("starting a server")
        with tempfile.TemporaryDirectory() as folder, serve(model, args) as server:
            progress("the server reads the pages")
            params = greedy("", 1, EXACT)["sampling_params"]
            server.generate(text=[HEAD + page for page in pages()], sampling_params=params)
            file = Path(folder) / "prompt.txt"
            file.write_text(prompt)
            progress.done()
            return main(["explain", str(file), "--out", str(out), "--url", server.url])


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT))

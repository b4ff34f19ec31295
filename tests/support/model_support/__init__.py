"""What the tests of this folder run: real model runners in processes of their own, and references.

``jobs.py`` runs functions in forked children; ``engine.py`` is a scheduler's loop, cut down to
what a test steps through by hand, around SGLang's real model runner, pools, tree and batches;
``reference.py`` blends over the Hugging Face model in plain torch; ``prompts.py`` makes prompts.
Nothing here imports torch or sglang at the top except where only children import it.
"""

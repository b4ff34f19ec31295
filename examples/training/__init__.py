"""How the models under ``examples/models`` were made: plain PyTorch, no server.

``model.py`` the Llama architecture and its export; ``muon.py`` the optimizer for matrices;
``vocab.py`` the tokenizer; ``data.py`` batches; ``curriculum.py`` what is trained when;
``reuse.py`` full KV reuse and partial recompute on a ``transformers`` model; ``report.py`` the
figures. ``train_models.py`` beside this folder runs them.
"""

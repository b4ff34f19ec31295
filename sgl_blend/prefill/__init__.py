"""The blend prefill: row sets through the model's own layers. Tensors only; no SGLang.

=====================  ==========================================================
``passes.py``          the passes over a batch, by policy
``pieces.py``          what a batch for it is made of
``model.py``           what it asks of the model and of other ranks
``rows.py``            types that the attention files share
``attention.py``       attention of gapped rows by true token position
``question.py``        attention of a question's rows, and how much of it goes to each token
``attention_cuda.py``  both on CUDA, by our own kernels, else by FlashInfer
``scores.py``          a score for each slot of the KV pool (policy ``stored``)
=====================  ==========================================================
"""

"""The correctness gate: is blended KV what it claims to be, on this model and this machine?

==================  ============================================================
``state.py``        what the gate has decided: on, on at a raised ratio, or off and why
``model.py``        protocol: what the gate asks of a model (``engine/gate/model.py``)
``rotation.py``     how each layer encodes positions, measured at launch whatever the gate is told
``mechanics.py``    exact checks at launch on random tokens: rotation, copies, mask, recomputation
``fidelity.py``     blended against exact next-token distributions; the ratio ladder
``yardstick.py``    textbook attention, where SGLang's is not what the model means
``prompts.py``      calibration prompts: the operator's file, or a short built-in text
``budget.py``       how long a launch may take, and what is left out to keep to that
``window.py``       sampled live requests: a sliding window and what follows from it
==================  ============================================================

Knows no SGLang.
"""

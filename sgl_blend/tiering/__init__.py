"""Chunks between the KV pool and a chunk store. Knows torch and the store's client; no SGLang.

==================  =============================================================
``service.py``      one rank's side of the store: clients and threads
``loader.py``       one request's load: look up, decide, bring in layer by layer
``offload.py``      new chunks out of the pool into the store, in the background
``hostkv.py``       loaded chunks as the source of a blend prefill's tokens
``compose.py``      what has been loaded, as spans of the prompt
``search.py``       which stored chunks a prompt can use, neighbours included
``chunks.py``       one stored chunk on its way in, and which tokens of it a prompt can use
``speeds.py``       load or recompute, from measured speeds
``controller.py``   the arithmetic of that (CacheBlend, section 5); pure
``tally.py``        what comes of loads and of new chunks, counted
``advice.py``       load or recompute: the question and the answer
``rules.py``        under which rules loads run, and what they may hold together
``wish.py``         what a request would like from the store
``keys.py``         a prompt as chunks with the keys and contexts they are stored under
==================  =============================================================

Imports run downward in this table. A load that fails, is late or does not match its tokens is a
miss, and is counted; nothing here raises into a scheduler, except :class:`LoadFailed` inside a
forward pass that has begun on chunks which then did not arrive (``engine/wiring.py`` runs the
pass again without them).
"""

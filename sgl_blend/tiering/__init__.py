"""Chunks between the KV pool and a chunk store. Knows torch and the store's client; no SGLang.

==================  =============================================================
``service.py``      one rank's side of the store: clients, threads, measurements
``loader.py``       one request's load: look up, decide, bring in layer by layer
``offload.py``      new chunks out of the pool into the store, in the background
``hostkv.py``       loaded chunks as the source of a blend prefill's tokens
``chunks.py``       one stored chunk on its way in, and which tokens of it a prompt can use
``wish.py``         what a request wants, under which rules, and who advises
``keys.py``         a prompt as chunks with the keys and contexts they are stored under
==================  =============================================================

Imports run downward in this table. A load that fails, is late or does not match its tokens is a
miss; nothing here raises into a scheduler, except :class:`LoadFailed` inside a forward pass that
has begun on chunks which then did not arrive (``prefill.py`` runs the pass again without them).
"""

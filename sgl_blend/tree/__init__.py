"""SGLang's radix tree with content-hash chunks beside exact prefixes. Knows SGLang's ``mem_cache``.

==================  =============================================================
``cache.py``        ``BlendRadixCache``: exact and approximate KV in one tree
``chunked.py``      below it: a ``RadixCache`` whose nodes know their chunks
``matching.py``     a prompt's spans: chunks that are looked up, verified and extended
``chunk_index.py``  content hash -> where copies of that chunk lie in the tree
``prompts.py``      which prompts were blended, so that the same one finds its own KV
``marks.py``        the key under which approximate KV is filed
``integrity.py``    ``check_tree``: tree, index and pool agree; tests call it after each operation
==================  =============================================================
"""

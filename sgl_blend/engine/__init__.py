"""The plugin: everything that hooks into SGLang.

==============  =================================================================
``plugin.py``   the entry point; ``platform.py`` the one of the CPU platform
``seams.py``    every SGLang symbol that is hooked or overridden, checked at launch
``wiring.py``   builds the tree and installs the forward hooks in the scheduler process
``metrics.py``  Prometheus counters
``launch/``     the launching process: flags, checks, the server's own store, routes
``request/``    one request from its body to its response
``forward/``    the blend prefill inside the model runner
``gate/``       the correctness gate on the loaded model
==============  =================================================================

``tree/`` subclasses SGLang's radix cache, and ``store/tiers/hicache.py`` adapts its storage
backends; no other module imports SGLang.
"""

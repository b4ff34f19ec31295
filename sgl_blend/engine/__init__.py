"""The only room that knows SGLang's internals.

``plugin.py`` is the entry point; ``seams.py`` lists every SGLang symbol that is touched;
``flags.py``, ``checks.py`` and ``platform.py`` act at launch; ``backend.py`` builds the tree and
installs the forward hooks in the scheduler process; ``options.py``, ``planner.py`` and
``report.py`` follow one request from its body to its response.
"""

"""What a person runs to see whether answers hold. May touch servers over HTTP, never an engine.

``tasks.py`` makes seeded multi-document questions whose answers are known; the models under
``examples/models`` were trained on them. It needs nothing but the standard library.
"""

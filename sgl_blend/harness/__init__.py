"""Starts real servers on this machine and talks to them: a tool of ``bench``, ``eval`` and the
tests."""

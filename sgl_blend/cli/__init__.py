"""The ``sgl-blend`` command. One file a subcommand; each talks to a server or a store."""

"""One module per method version, named ``<name>_v<N>``; nothing else lives here."""

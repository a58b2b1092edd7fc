"""The online side of the store: what is known of a user right now, kept in Feast and read by the server.

``repository`` opens the Feast repository, ``values`` computes what is pushed, ``follow`` keeps it fresh,
``contexts`` reads it, ``exports`` keeps its past. Importing this package imports nothing heavy; the modules
that need Feast (2.5 s) are ``repository``, ``contexts`` and ``exports``, and they import it when opened.
"""

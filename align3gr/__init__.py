"""Settings, command line, server and demo: composes the other rooms."""

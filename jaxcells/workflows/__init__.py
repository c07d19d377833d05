"""One file a verb: each reads the config and says, top to bottom, what happens."""

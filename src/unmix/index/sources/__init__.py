"""What feeds an index: sources of encoded contexts, each reopened by workers from plain arguments."""

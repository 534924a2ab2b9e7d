"""Guest RAM as images: private mappings, pages of one's own, sparse files, checkpoints."""

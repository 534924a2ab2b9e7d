"""Code that only a quick start needs (docs/architecture.md, "What the boot path may import")."""

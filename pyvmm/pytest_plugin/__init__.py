"""The pytest plugin: virtual machines as fixtures (docs/pytest.md)."""

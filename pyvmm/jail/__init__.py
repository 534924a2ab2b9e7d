"""The jail: all that a process gives up before the guest's first instruction (docs/jail.md)."""

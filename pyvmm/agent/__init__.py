"""The host's half of the agent: a program in the guest that takes orders (docs/agent.md)."""

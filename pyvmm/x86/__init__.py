"""The x86-64 parts: the address map, kernel loading, CPU state, CPUID."""

"""What is particular to x86-64: the address map, kernel loading, CPU state, CPUID."""

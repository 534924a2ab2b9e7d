"""A program that tries to get out of the jail, in the place of each thread of a running pyvmm.

    python -m tests.support.escape REPORT MODE COMMAND...

COMMAND is a command line of pyvmm's, as ``run --kernel x``, and takes the usual path.  When one of
its threads is about to take its filter, the jail of the whole process is in force already.  There
the thread forks a child for each attempt.  The child takes the thread's filter as the thread would,
and makes its attempt with all rights that code in this thread would have.

MODE is one of

* ``attempts``: each attempt of ``attempts.py`` under the thread's filter, and once without any
  filter: the rest of the jail alone;
* ``numbers``: every system call by its number, under the thread's filter;
* ``real:KIND:ATTEMPT``: no child; the thread of that kind makes the attempt itself.

REPORT becomes JSON: ``{"status": exit status, "kinds": {KIND: {ATTEMPT: [RESULT, TABLE]}}}``.  A
result is "killed" (SIGSYS), "errno N", "ok", "hung", or "signal N".  TABLE is what the written table
has: "killed", "errno N" or "allowed".  KIND "" stands for no filter.
"""

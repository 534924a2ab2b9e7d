"""A program that tries to get out of the jail, in the place of each thread of a running pyvmm.

    python -m tests.support.escape REPORT MODE COMMAND...

COMMAND is a command line of pyvmm's, as ``run --kernel x``, and takes the usual path.  When one of
its threads is about to take its filter, the jail of the whole process is in force already.  There
the thread forks a child for each attempt.  The child takes the thread's filter as the thread would,
and makes its attempt with all rights that code in this thread would have.

MODE is one of

* ``attempts``: each attempt of ``attempts.py`` under the filter of each thread;
* ``attempts:KIND``: the same in one kind of thread.  KIND "none" stands for no filter: the rest of
  the jail alone, in the first thread;
* ``numbers:KIND``: every system call by its number, in one kind of thread;
* ``real:KIND:ATTEMPT``: no child; the thread of that kind makes the attempt itself.

REPORT becomes JSON: ``{"status": exit status, "kinds": {KIND: {ATTEMPT: [RESULT, TABLE]}}}``.  A
result is "killed" (SIGSYS), "errno N", "ok", "hung", "signal N", or "lost" if the whole process
ended.  TABLE is what the written table has: "killed", "errno N" or "allowed".
"""

"""The 56 faults of docs/reliability.md, each a short function: scripts/fault_matrix.py runs them.

kills.py files.py signals.py processes.py numbers.py images.py sweeps.py security.py    the rows, by topic
registry.py     what a row is
programs.py     the two programs that the faults happen to: this project's commands, and a plain Lightning script
injecting.py    puts a fault into a process: a real signal or a half-written file at the n-th call of a function
page.py         docs/reliability.md
"""

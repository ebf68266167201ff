import os

# The interpreter and the compiler cannot share a process: triton decides when it is imported.
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_interpreter.py", "test_ahead_of_time.py", "test_specialization.py"]
else:
    collect_ignore = ["interpreted"]

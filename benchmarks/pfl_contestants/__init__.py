"""The contestants of ``pfl_protocol.py``, each a process of its own that trains a turn of rounds whenever a line says
so.
"""

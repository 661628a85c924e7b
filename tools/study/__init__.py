"""Studies of architectures: a plan, its runs and costs, and the report that a folder of them makes.

The report: results reads the folder; pairs, claims, tables, data_files and figures (of charts) each make a part; page
writes them all.
"""

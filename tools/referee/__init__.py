"""The referee's rules, by what they need to decide: the record's files, the judge's text, the submission running.

Each rule of tools/rules.json has one or more parts; a part is a function registered with @check in the file named after
what it looks at. tools.verify runs them all and makes the verdict.
"""

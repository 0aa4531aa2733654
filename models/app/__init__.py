"""The page of `draft-video app`: a form, a queue, and the runs of a folder.

Only `page`, `server` and `command` need the extra `app`, and import Gradio in functions
or when the command runs. Nothing else of the project imports this package.
"""

"""Gradio's side of the app: loaded when the app is started, and by nothing else."""

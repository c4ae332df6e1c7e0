"""The app in a browser: a queue of its own, a folder of results, and Gradio's pages over both."""

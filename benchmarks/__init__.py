"""Speed of pyqsd beside that of its peers. `python -m benchmarks --help`; nothing here is a test."""

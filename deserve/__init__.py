"""DeServe: offline batch inference of large language models on GPUs that are far apart."""

__version__ = "0.2.0"

"""How models become small, and how they run. Knows neither Django nor Celery.

After ``import compression_worker``, transformers' ``from_pretrained`` loads artifacts that stand alone.
"""

from compression_worker.quantizers import register_with_transformers

register_with_transformers()

"""The bundled demonstration: texts, the pair of models trained on them, and the sample sets that measure it."""

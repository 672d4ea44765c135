"""DeltaLLM beside what others do to make a model's layers fewer or thinner, at equal parameters and equal training.

Ours is made by the project's command line. Peers are small: blocks dropped by block influence (ShortGPT,
arXiv:2403.03853), attention and MLP dropped one by one (as JointDrop does, arXiv:2406.15786), blocks merged into the
one before (as LaCo does, arXiv:2402.11187), the least principal directions of the residual stream deleted (SliceGPT,
arXiv:2401.15024), and every matrix as a product of two thin ones, by its own singular values or by those of what it
does to its input. Each then learns the full model's answers from as many tokens of the same text: what is left of a
dropped, merged or sliced model by LoRA, thin matrices by themselves.
"""

"""T2I-CompBench++ (Huang et al., arXiv 2307.06350): attributes, spatial relations, other relations, complex prompts."""

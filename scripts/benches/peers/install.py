"""The peers' environments: one each, because their pins contradict one another and ours.

Versions are pinned by the files `lock/peer-*.txt`... 
"""

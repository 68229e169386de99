"""What training will need, before anything is allocated: memory, communication, time.

`host` and `devices` say what there is, `demand` adds up one setting, `speed` and `probe` give
seconds, `fitting` finds what fits instead, `plan` puts them together for every number of groups,
`table` shows it. How SAEs are dealt over devices is training's own: `groupsae.training.mesh`.
"""

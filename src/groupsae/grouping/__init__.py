"""Which layers share one sparse autoencoder. Pure: arrays in, arrays out; knows no language model.

`distance` measures how far apart the layers' residual streams are by angles, `similarity` by CKA or
SVCCA; `matrix` is the result and its files, `methods` cuts the layers into contiguous groups,
`partition` is such a cut and its measures, `table` chooses among them, and `cost` predicts what
training the choice costs. Only `distance` and `similarity` need torch.
"""

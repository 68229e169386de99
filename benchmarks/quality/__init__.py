"""How much is lost when layers share an SAE, for every number of groups: a study to run again."""

-- How far beyond its threshold each feature was (FEATURES' order, null where it was not compared), beside the verdict's
-- body: a month of them is drawn without reading the bodies. Those from before have none.
alter table verdict add column ratios real[];

-- Dollars a month, beside those a day.
alter table allowance drop constraint allowance_kind_check;
alter table allowance add constraint allowance_kind_check check (kind in ('requests', 'tokens', 'usd', 'usd_month'));

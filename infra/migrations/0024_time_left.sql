-- What a running search takes yet, as its coordinator last reckoned; null before a rung is done.
alter table study add column seconds_left double precision;

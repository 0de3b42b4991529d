#!lua flags=allow-oom
-- Let go of a photo, and keep, publish and list what came of it: in one step, and once.
local id, json, size = unpack(ARGV)
local photo = 'faces:photo:' .. id
if redis.call('ZREM', 'faces:jobs', id) == 0 then return end
redis.call('DECRBY', 'faces:bytes', redis.call('HSTRLEN', photo, 'photo'))
redis.call('DEL', photo)
redis.call('HSET', 'faces:image:' .. id, 'json', json)
redis.call('XADD', 'faces:news', 'MAXLEN', '~', 1000, '*', 'id', id, 'json', json)
if size ~= '0' then
  redis.call('LPUSH', 'faces:newest', id)
  redis.call('LTRIM', 'faces:newest', 0, 99)
end

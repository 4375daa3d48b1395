-- Prioritised replay inside a Redis server. An operation is one call of this script: one round trip,
-- and one step that no other client sees half of.
--
--   leaves    p^α of each slot, float64 after float64 in one string
--   sums:1    the sum of each 32 leaves, likewise; sums:2 of each 32 of those, … up to at most 2,048
--   rows:i    the items themselves, `per_key` slots in one string, byte after byte
--   clients   for each writer its newest call and what came of it, so that none counts twice
--   meta      schema, capacity, row_bytes, per_key, added, base, largest, server
--
-- An item's key is base + how many items were added before it; its slot is that number % capacity.
-- `base` is a multiple of the capacity, taken from the clock in microseconds whenever the server was
-- started again: should it have forgotten its last second, or all, keys of then are nobody's now.
--
-- Sums are no part of the log from which a server starts again: they are made anew from the leaves.

local call, floor, ceil, min, max = redis.call, math.floor, math.ceil, math.min, math.max
local unpack_numbers, sub = struct.unpack, string.sub
local meta, leaves, sums, clients, rows = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local operation = ARGV[1]
local FAN, TOP = 32, 2048
local GROUP, BYTES = '<' .. string.rep('d', FAN), 8 * FAN

local function whole(x) return string.format('%.0f', x) end  -- tostring() rounds from 10^14 on
local function pack(x) return struct.pack('<d', x) end

local function doubles(text)  -- the numbers of a string, as a table
  local found, count = {}, #text / 8
  for from = 0, count - 1, FAN do
    local n = min(FAN, count - from)
    local form = n == FAN and GROUP or '<' .. string.rep('d', n)
    local part = {unpack_numbers(form, text, 8 * from + 1)}
    for i = 1, n do found[from + i] = part[i] end
  end
  return found
end

local function sum(numbers, count)
  local total = 0
  for i = 1, count do total = total + numbers[i] end
  return total
end

local function level(number) return number == 0 and leaves or sums .. number end

local function depth(capacity)  -- levels of sums
  local found, nodes = 0, capacity
  repeat found, nodes = found + 1, ceil(nodes / FAN) until nodes <= TOP
  return found
end

local function groups_of(number, first, last)  -- the text of FAN neighbours each of a level
  return call('GETRANGE', level(number), BYTES * first, BYTES * last + BYTES - 1)
end

local function group(number, index)
  return {unpack_numbers(GROUP, groups_of(number, index, index))}
end

local function add_up(deep, first, last)  -- all above the groups of leaves first … last
  redis.set_repl(redis.REPL_NONE)
  for above = 1, deep do
    local text, found = groups_of(above - 1, first, last), {}
    for i = 0, last - first do
      found[i + 1] = pack(sum({unpack_numbers(GROUP, text, BYTES * i + 1)}, FAN))
    end
    call('SETRANGE', level(above), 8 * first, table.concat(found))
    first, last = floor(first / FAN), floor(last / FAN)
  end
  redis.set_repl(redis.REPL_ALL)
end

local function add_up_some(deep, groups)  -- the same for a list of groups
  redis.set_repl(redis.REPL_NONE)
  for above = 1, deep do
    local text, parents, known = above > 1 and call('GET', level(above - 1)), {}, {}
    for _, index in ipairs(groups) do
      local part = text and {unpack_numbers(GROUP, text, BYTES * index + 1)} or group(0, index)
      call('SETRANGE', level(above), 8 * index, pack(sum(part, FAN)))
      local parent = floor(index / FAN)
      if not known[parent] then known[parent], parents[#parents + 1] = true, parent end
    end
    groups = parents
  end
  redis.set_repl(redis.REPL_ALL)
end

local function rebuild(capacity)  -- all sums; strings as long as they will ever be
  local deep, nodes = depth(capacity), capacity
  redis.set_repl(redis.REPL_NONE)
  for above = 0, deep do
    nodes = FAN * ceil(nodes / FAN)
    if call('STRLEN', level(above)) < 8 * nodes then
      call('SETRANGE', level(above), 8 * nodes - 1, '\0')
    end
    nodes = nodes / FAN
  end
  redis.set_repl(redis.REPL_ALL)
  for first = 0, ceil(capacity / FAN) - 1, TOP do
    add_up(deep, first, min(first + TOP, ceil(capacity / FAN)) - 1)
  end
end

local function server()  -- a name that changes when the server is started again
  return string.match(call('INFO', 'server'), 'run_id:(%w+)')
end

local function first_key(capacity, least)  -- of a new life
  local now = call('TIME')
  return whole(capacity * ceil(max(now[1] * 1e6 + now[2], least) / capacity))
end

if operation == 'open' then  -- schema, capacity, row_bytes, per_key, largest
  local capacity = tonumber(ARGV[3])
  local known = call('HMGET', meta, 'schema', 'server', 'added', 'base')
  if known[1] and known[1] ~= ARGV[2] then return known[1] end
  if not known[1] then
    call('HSET', meta, 'schema', ARGV[2], 'capacity', ARGV[3], 'row_bytes', ARGV[4], 'per_key',
      ARGV[5], 'largest', ARGV[6], 'added', 0, 'base', first_key(capacity, 0), 'server', server())
    rebuild(capacity)
  elseif known[2] ~= server() then
    local base = first_key(capacity, known[4] + known[3] + capacity)
    call('HSET', meta, 'base', base, 'server', server())
    rebuild(capacity)
  end
  return ARGV[2]
end

local known = call('HMGET', meta, 'capacity', 'row_bytes', 'per_key', 'added', 'base', 'largest')
if not known[1] then return redis.error_reply('MISSING there is no such replay') end
local capacity, row_bytes, per_key = tonumber(known[1]), tonumber(known[2]), tonumber(known[3])
local added, base, largest = tonumber(known[4]), tonumber(known[5]), tonumber(known[6])
local held, deep = min(added, capacity), depth(capacity)

local function keep_largest(most)
  if most > largest then call('HSET', meta, 'largest', string.format('%.17g', most)) end
end

local function add(client, number, count, data, scaled, most)
  local last, first = string.match(call('HGET', clients, client) or '', '(%d+):(%d+)')
  if last == number then return base + first end  -- it was done, only the answer got lost
  if scaled == '' then scaled, most = string.rep(pack(largest), count), largest end
  local taken, touched = 0, {}
  while taken < count do
    local slot = (added + taken) % capacity
    local within = slot % per_key
    local n = min(count - taken, per_key - within, capacity - slot)
    local text = sub(data, taken * row_bytes + 1, (taken + n) * row_bytes)
    call('SETRANGE', rows .. floor(slot / per_key), within * row_bytes, text)
    call('SETRANGE', leaves, 8 * slot, sub(scaled, 8 * taken + 1, 8 * (taken + n)))
    touched[#touched + 1] = {floor(slot / FAN), floor((slot + n - 1) / FAN)}
    taken = taken + n
  end
  call('HSET', clients, client, number .. ':' .. whole(added))
  call('HSET', meta, 'added', whole(added + count))
  keep_largest(most)
  for _, run in ipairs(touched) do add_up(deep, run[1], run[2]) end
  return base + added
end

local function item(slot, leaf)  -- its key, its leaf and its row, as bytes
  local index = slot + floor((added - 1 - slot) / capacity) * capacity
  local within = slot % per_key * row_bytes
  local row = call('GETRANGE', rows .. floor(slot / per_key), within, within + row_bytes - 1)
  return struct.pack('<dd', base + index, leaf) .. row
end

local function at_top(draws, top, total)  -- where each draw falls, and what is left of it there
  local share, number, before, last, node, rest = total / #draws, 1, 0, #top, {}, {}
  while top[last] == 0 do last = last - 1 end
  for k, draw in ipairs(draws) do
    local x = (k - 1 + draw) * share
    while number < last and x >= before + top[number] do
      before, number = before + top[number], number + 1
    end
    node[k], rest[k] = number - 1, x - before
  end
  return node, rest
end

local function step(below, node, rest)  -- one level down; gives the priorities there
  local text, found, index, part = below > 0 and call('GET', level(below)), {}, -1, nil
  for k = 1, #node do
    if node[k] ~= index then
      index = node[k]
      part = text and {unpack_numbers(GROUP, text, BYTES * index + 1)} or group(below, index)
    end
    local x, upto, before, chosen = rest[k], 0, 0, 1
    for i = 1, FAN do
      local p = part[i]
      if p > 0 then  -- so that rounding never ends where nothing is
        chosen, before, upto = i, upto, upto + p
        if x < upto then break end
      end
    end
    node[k], rest[k], found[k] = FAN * index + chosen - 1, x - before, part[chosen]
  end
  return found
end

local function sample(draws)  -- one draw from each equal share of the total; draws in [0, 1)
  local top, found = doubles(call('GET', level(deep))), {}
  local total = sum(top, #top)
  if total == 0 then
    for k, draw in ipairs(draws) do
      found[k] = item((added - 1 - floor(draw * held)) % capacity, 0)
    end
    return total, found
  end
  local node, rest = at_top(draws, top, total)
  for below = deep - 1, 0, -1 do found = step(below, node, rest) end
  for k, slot in ipairs(node) do found[k] = item(slot, found[k]) end
  return total, found
end

local function update(keys, scaled)  -- of equal keys the last one counts
  local alive, most, touched, groups = 0, largest, {}, {}
  for i, key in ipairs(keys) do
    local index = key - base
    if index >= added - held and index < added then
      local slot = index % capacity
      local leaf = sub(scaled, 8 * i - 7, 8 * i)
      call('SETRANGE', leaves, 8 * slot, leaf)
      alive, most = alive + 1, max(most, (unpack_numbers('<d', leaf)))
      local number = floor(slot / FAN)
      if not touched[number] then touched[number], groups[#groups + 1] = true, number end
    end
  end
  keep_largest(most)
  add_up_some(deep, groups)
  return alive
end

if operation == 'add' then
  return whole(add(ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6], tonumber(ARGV[7])))
elseif operation == 'sample' then
  if added == 0 then return {0, pack(0), ''} end
  local total, found = sample(doubles(ARGV[2]))
  return {held, pack(total), table.concat(found)}
elseif operation == 'update' then
  return update(doubles(ARGV[2]), ARGV[3])
elseif operation == 'report' then
  local least, top = math.huge, doubles(call('GET', level(deep)))
  if ARGV[2] == 'least' then
    for index = 0, ceil(held / FAN) - 1 do
      local part = group(0, index)
      for i = 1, FAN do
        if part[i] > 0 then least = min(least, part[i]) end
      end
    end
  end
  return {whole(added), whole(base), pack(sum(top, #top)), pack(largest), pack(least)}
elseif operation == 'rebuild' then
  rebuild(capacity)
  return 'OK'
end
return redis.error_reply('ERR unknown operation ' .. operation)
